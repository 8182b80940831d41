$stdout.sync = true
puts "a"; File.open("/dev/stdout", "w") { |f| f.puts "b" }; puts "c"
