// differential: {"stdin": "3 4\n"}
package main

import "fmt"

func main() { var a, b int; fmt.Scan(&a, &b); fmt.Println(a+b, []int{1}, map[string]int{"b": 1, "a": 2}) }
