# shellcheck shell=bash
# Sourced, never run: messages, steps with a log, and the lock that keeps two set-ups of one checkout apart.
# Messages go to stderr, so that what a command prints on stdout stays its own.

say() { printf '==> %s\n' "$*" >&2; }
note() { printf '    %s\n' "$*" >&2; }
warn() { printf 'warning: %s\n' "$*" >&2; }
err() { printf 'error: %s\n' "$*" >&2; }

die() {
    err "$@"
    exit 1
}

# Continuous integration and service managers may start us without a standard input, and then the next file that is
# opened becomes descriptor 0.
ensure_stdin() {
    if ! { : <&0; } 2>/dev/null; then
        exec </dev/null
    fi
}

# step TEXT COMMAND...: announce, run with the output in $STEP_LOG, tell how long it took. On failure the end of the
# log is shown and the command's status returned; what follows from it is the caller's choice.
step() {
    local text=$1 begin=$SECONDS status=0
    shift
    say "$text"
    printf '\n--- %s: %s\n' "$text" "$*" >>"$STEP_LOG"
    "$@" </dev/null >>"$STEP_LOG" 2>&1 || status=$?
    if ((status != 0)); then
        err "failed (status $status): $text"
        err "the last lines of $STEP_LOG:"
        tail -n 25 -- "$STEP_LOG" | sed 's/^/    /' >&2
        return "$status"
    fi
    note "done in $((SECONDS - begin)) s"
}

# The lock sits on descriptor 9. Child processes inherit it on purpose: a pip that outlives its parent is still
# writing, and must still be waited for.
readonly LOCK_WAIT_S=1800

take_lock() {
    exec 9>"$1"
    if flock --nonblock 9; then return; fi
    say "another set-up is at work in this checkout; waiting for it (at most $((LOCK_WAIT_S / 60)) minutes)"
    flock --timeout "$LOCK_WAIT_S" 9 || die "it is still at work after $((LOCK_WAIT_S / 60)) minutes; lock: $1"
}

# free_mib PATH: the room left on the file system that holds PATH.
free_mib() { df -Pk -- "$1" | awk 'NR == 2 { print int($4 / 1024) }'; }
