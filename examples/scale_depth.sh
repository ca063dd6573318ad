#!/usr/bin/env bash
# Depth against width at fixed data: examples/sweeps/depth.toml, laws and report. Hours on two cores.
exec bash "$(dirname "${BASH_SOURCE[0]}")/scale.sh" depth "$@"
