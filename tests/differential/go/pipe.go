package main

import (
	"fmt"
	"os"
)

func main() { r, w, _ := os.Pipe(); r.Close(); _, err := w.Write([]byte("x")); fmt.Println(err); f, err := os.OpenFile("/dev/stdout", os.O_WRONLY|os.O_TRUNC, 0); fmt.Fprintln(f, "again", err) }
