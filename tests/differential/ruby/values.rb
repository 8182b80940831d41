p({ a: 1, "b" => [nil, true, 1.5, 2**70, :s, 1..3] }, "é✓".bytes.size, "ab".unpack("C*"), 7 / -2, -7 % 3, 0.1 + 0.2, 10.digits)
