# differential: {"env": {"MINE": "x y"}}
echo "$MINE" "$HOME" "$PWD" "$LANG"; env | grep -c MINE; unset HOME; cd; echo $?
