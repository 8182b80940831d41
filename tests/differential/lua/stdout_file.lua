local f = io.open("/dev/stdout", "w"); io.write("a\n"); io.flush(); f:write("b\n"); f:close(); print("c")
