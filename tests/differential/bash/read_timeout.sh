read -t 0.05 x < <(sleep 1); echo $(($? > 128))
