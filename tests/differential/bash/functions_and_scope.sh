f() { local x=2; g; return 7; }; g() { echo $x; x=3; }; x=1; f; echo $? $x
