# differential: {"stdin": "x = 2\nx + 3\n1/0\n"}
import code
code.interact(banner="hi", exitmsg="bye", local={})
