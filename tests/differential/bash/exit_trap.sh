trap 'echo bye; exit 4' EXIT
echo hi
exit 2
