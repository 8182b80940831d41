# differential: {"stdin": "x"}
print -t STDIN ? "tty" : "no", " ", -p STDIN ? "pipe" : "no", " ", -p STDOUT ? "pipe" : "no", "\n";
