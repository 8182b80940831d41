at_exit { puts "bye" }
exit 7
