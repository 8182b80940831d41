times > /dev/null; type -t echo; command -v bash; sleep 0.01; echo $((SECONDS < 60))
