local function f() error("bad") end
f()
