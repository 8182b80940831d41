# differential: {"args": ["a b", "", "*", "-n"]}
echo $# "$1" "[$2]" "$3" "$4" "${0##*/}"; shift; printf '<%s>' "$@"
