# The environment that test.sh and demo.sh share; source it from the repository's root.
#
#   environment EXTRA...   makes .venv (if missing), installs the project with these extras (unless they
#                          are there already) and sets PY to its Python
#   PYTHON=python3.12      the interpreter to make it from; if .venv has another version, the environment
#                          is .venv-3.12 beside it

INSTALLED=.installed                # in the environment: "<hash of pyproject.toml and place> <extra>" a line
TORCH=${TORCH:-torch==2.13.0}       # what the tests compare with; a fixed version, so that runs are alike

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }

# The version of an interpreter, as 3.12; fails if it does not run or is older than 3.11.
python_version() {
    "$1" -c 'import sys; v = sys.version_info; print(f"{v[0]}.{v[1]}"); sys.exit(v < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if python_version "$candidate" >/dev/null; then echo "$candidate" && return; fi
    done
    echo "error: no Python 3.11 or newer (tried ${PYTHON:-python3, python3.13, python3.12, python3.11}); set PYTHON" >&2
    return 1
}

environment() {
    local venv=.venv python version stamp extra missing=()
    if [[ -n ${PYTHON:-} || ! -x .venv/bin/python ]]; then
        python=$(find_python)
        version=$(python_version "$python")
        if [[ -x .venv/bin/python && $(python_version .venv/bin/python) != "$version" ]]; then
            venv=.venv-$version
        fi
    fi
    PY=$PWD/$venv/bin/python
    if ! "$PY" -m pip --version >/dev/null 2>&1; then  # absent, or its making was interrupted
        python=${python:-$(find_python)}
        say "making $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv"
    fi

    stamp=$({ cat pyproject.toml; echo "$PWD"; } | "$PY" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    for extra in "$@"; do
        grep -qxF "$stamp $extra" "$venv/$INSTALLED" 2>/dev/null || missing+=("$extra")
    done
    ((${#missing[@]})) || return 0

    if [[ " ${missing[*]} " == *" test "* ]] && ! "$PY" -c 'import torch' 2>/dev/null; then
        pip_install "$venv" "$TORCH" "$TORCH"
    fi
    pip_install "$venv" "meteora-jax[$(IFS=,; echo "${missing[*]}")]" -e ".[$(IFS=,; echo "${missing[*]}")]"
    printf "$stamp %s\n" "${missing[@]}" >>"$venv/$INSTALLED"  # last: an interrupted install starts over
}

# pip_install VENV WHAT ARGUMENT...   pip install ARGUMENT...; its hundreds of lines go into VENV/install.log. Here a line
#                                     and, on a terminal, how many packages are found, then a bar of those unpacked
pip_install() {
    local venv=$1 what=$2 log=$1/install.log began=$SECONDS before pip
    shift 2
    say "installing $what into $venv"
    before=$(count_packages "$venv")
    : >"$log"
    "$PY" -m pip install --disable-pip-version-check --progress-bar off "$@" >"$log" 2>&1 &
    pip=$!
    trap 'kill "$pip" 2>/dev/null; exit 130' INT TERM  # a shell's background job does not see Ctrl-C
    while kill -0 "$pip" 2>/dev/null; do
        if [[ -t 2 ]]; then pip_progress "$log" "$(($(count_packages "$venv") - before))" "$((SECONDS - began))"; fi
        sleep 0.5
    done
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
    trap - INT TERM
    if ! wait "$pip"; then
        grep '^ERROR' "$log" | head -n 3 >&2 || tail -n 3 "$log" >&2
        echo "error: pip could not install $what; all it said: $PWD/$log" >&2
        return 1
    fi
    say "installed in $((SECONDS - began)) s"
}

count_packages() { find "$1" -maxdepth 4 -path '*/site-packages/*.dist-info' | wc -l; }

# pip_progress LOG UNPACKED SECONDS
pip_progress() {
    local names total done bar
    names=$(grep -m 1 '^Installing collected packages: ' "$1" || true)
    if [[ -z $names ]]; then
        printf '\r\033[K   %s packages found, %s s' "$(grep -c '^Collecting ' "$1" || true)" "$3" >&2
        return
    fi
    names=${names//[^,]/}
    total=$((${#names} + 1))
    done=$(($2 > total ? total : $2))
    printf -v bar '%*s' $((30 * done / total)) ''
    printf '\r\033[K   [%-30s] %s of %s packages, %s s' "${bar// /#}" "$done" "$total" "$3" >&2
}
