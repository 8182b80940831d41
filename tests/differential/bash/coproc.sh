coproc cat; echo hi >&"${COPROC[1]}"; read x <&"${COPROC[0]}"; echo "$x"
