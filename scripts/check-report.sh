#!/usr/bin/env bash
# Opens report.html and the SVG curves of a run in a real headless browser: bash scripts/check-report.sh [RUN] [--shots DIR]
#
# RUN: a folder with report.html; default: the run that `cargo test --test report` leaves in target/tmp/report.
# The browser: $GLMTUNE_BROWSER, else a Chromium that is installed, else Debian's package chromium-headless-shell, installed by
# apt-get (as root, or through sudo where that asks no password). Beside it only python3 is needed: no driver, no module.
set -euo pipefail
cd "$(dirname "$0")/.."

run=target/tmp/report/run
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    run=$1
    shift
fi
if [ ! -f "$run/report.html" ]; then
    echo "error: $run: found no report.html; run \`cargo test --test report\`, or name the folder of a run" >&2
    exit 1
fi

find_browser() {
    local name
    for name in "${GLMTUNE_BROWSER:-}" chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable; do
        if [ -n "$name" ] && command -v "$name"; then
            return
        fi
    done
    return 1
}

install_browser() {
    local as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo -n)
    command -v apt-get >/dev/null || return 1
    echo "installing Debian's chromium-headless-shell" >&2
    export DEBIAN_FRONTEND=noninteractive
    "${as_root[@]}" apt-get -qq update >&2 &&
        "${as_root[@]}" apt-get -qq install -y --no-install-recommends chromium-headless-shell >/dev/null
}

if ! browser=$(find_browser); then
    install_browser || true
    if ! browser=$(find_browser); then
        echo "error: no browser: install Chromium, or name one in GLMTUNE_BROWSER" >&2
        exit 1
    fi
fi

arguments=("$browser" "$run/report.html" --planted)
[ ! -d "$run/../svg" ] || arguments+=(--svg "$run/../svg")
exec python3 scripts/check-report.py "${arguments[@]}" "$@"
