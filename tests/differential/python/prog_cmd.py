# differential: {"stdin": "hello bob\nquit\n"}
import cmd
class C(cmd.Cmd):
    prompt = "> "
    def do_hello(self, a): print("hi", a)
    def do_quit(self, a): return True
C().cmdloop()
