#!/usr/bin/env bash
# Loss against width at fixed depth and data: examples/sweeps/width.toml, laws and report. Hours on two cores.
exec bash "$(dirname "${BASH_SOURCE[0]}")/scale.sh" width "$@"
