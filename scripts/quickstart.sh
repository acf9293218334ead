#!/usr/bin/env bash
# Installs what is missing, then runs the main job: scripts/quickstart.py says what that is and what it takes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
set_up train
python -m scripts.quickstart "$@"
