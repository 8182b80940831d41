# differential: {"stdin": "a\nb"}
while (line = gets)
  p line
end
