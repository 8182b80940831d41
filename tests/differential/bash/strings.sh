s="hello world"; echo "${s^^} ${s/o/0} ${s//o/0} ${s:6} ${#s} ${s%% *} ${s:-x} ${u:=d} $u"
