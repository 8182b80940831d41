package main

import "os"

func main() { defer os.Stdout.WriteString("deferred\n"); os.Stdout.WriteString("before\n"); os.Exit(f()) }

func f() int { return 3 }
