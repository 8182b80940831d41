puts `echo hi`, $?.exitstatus, system("exit 3").inspect, $?.exitstatus
