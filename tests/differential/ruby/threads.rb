q = Queue.new; t = Thread.new { 3.times { |i| q << i }; q << nil }; while (x = q.pop); puts x; end; t.join
Thread.new { raise "in a thread" }.join
