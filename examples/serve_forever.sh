#!/usr/bin/env bash
# Keeps a server running: starts it, asks for its health, and starts it anew when it ended or does not answer.
#
#     examples/serve_forever.sh MODEL --port 8000 --kv-compression qfilters --kv-compression-config.budget 2048
#
# It takes the flags of `vllm serve`, except for --uds and those of TLS, and asks the address of --host, or else
# 127.0.0.1. A server that ends before its first start is complete is not tried again: its flags are wrong. SIGTERM ends
# both. These variables change the times, in seconds:
#
#     START_SECONDS   until a start must be complete, calibration included (1800)
#     HEALTH_SECONDS  between two questions for its health (10); three in a row without an answer mean a restart
#     STOP_SECONDS    that a server gets to end by itself (60)
set -u
START_SECONDS=${START_SECONDS:-1800} HEALTH_SECONDS=${HEALTH_SECONDS:-10} STOP_SECONDS=${STOP_SECONDS:-60}
MOST_PAUSE=60

host=127.0.0.1 port=8000 previous=
for argument in "$@"; do
    case $previous in --port) port=$argument ;; --host) host=$argument ;; esac
    case $argument in --port=*) port=${argument#--port=} ;; --host=*) host=${argument#--host=} ;; esac
    previous=$argument
done
[ "$host" = 0.0.0.0 ] && host=127.0.0.1

say() { echo "serve_forever: $*" >&2; }
is_healthy() { curl --silent --fail --max-time 5 --output /dev/null "http://$host:$port/health"; }
is_running() { kill -0 "$server" 2>/dev/null; }

stop_server() {
    kill -TERM "$server" 2>/dev/null
    for ((second = 0; second < STOP_SECONDS; second++)); do
        is_running || break
        sleep 1
    done
    kill -KILL -- "-$server" 2>/dev/null # the whole group: no engine or worker stays behind
}

server=
trap 'say "stopping"; [ -n "$server" ] && stop_server; exit 0' TERM INT

if is_healthy; then
    say "port $port is taken: something answers there already"
    exit 1
fi
was_healthy=false pause=1
while true; do
    setsid vllm serve "$@" &
    server=$! is_up=false
    started=$SECONDS
    while is_running && ((SECONDS - started <= START_SECONDS)); do
        if is_healthy; then
            is_up=true
            break
        fi
        sleep 1
    done
    if $is_up; then
        say "up after $((SECONDS - started)) s"
        was_healthy=true pause=1 missed=0
        while is_running && ((missed < 3)); do
            sleep "$HEALTH_SECONDS" &
            wait $! # a signal interrupts wait, and not sleep
            if is_healthy; then missed=0; else missed=$((missed + 1)); fi
        done
        if is_running; then say "no answer to three questions for its health"; else say "the server ended"; fi
    elif ! $was_healthy; then
        say "the server did not start; its log says why"
        stop_server
        exit 1
    fi
    stop_server
    wait "$server" 2>/dev/null
    server=
    say "starting anew in $pause s"
    sleep "$pause" &
    wait $!
    pause=$((pause * 2 < MOST_PAUSE ? pause * 2 : MOST_PAUSE))
done
