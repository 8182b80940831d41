mkdir -p a/b; touch a/x a/b/y; find . -type f -name '[xy]' | sort | xargs -n 1 basename; seq 3 | paste -sd+ | tee expr; bc < expr 2>/dev/null || echo $((1 + 2 + 3))
