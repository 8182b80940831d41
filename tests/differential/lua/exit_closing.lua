setmetatable({}, { __gc = function() print("collected") end }); os.exit(true, true)
