#!/bin/sh
# Runs a compiler and fails where ptxas says that it had to serialise wgmma instructions, each then
# waiting for the one before: it is a note (C7510 and its neighbours), so no -Werror sees it.
log=$("$@" 2>&1)
code=$?
printf '%s' "$log"
case $log in *"wgmma.mma_async instructions are serialized"*) exit 1 ;; esac
exit $code
