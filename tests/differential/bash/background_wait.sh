for i in 1 2 3; do (sleep 0.0$i; echo $i >> f) & done; wait; sort f; echo done
