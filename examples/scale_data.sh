#!/usr/bin/env bash
# Loss against data size at three widths: examples/sweeps/data.toml, laws and report. Hours on two cores.
exec bash "$(dirname "${BASH_SOURCE[0]}")/scale.sh" data "$@"
