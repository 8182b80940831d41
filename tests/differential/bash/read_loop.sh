# differential: {"stdin": "1 2\n3 4\n5"}
while read -r a b || [ -n "$a" ]; do echo $((a + ${b:-0})); done
