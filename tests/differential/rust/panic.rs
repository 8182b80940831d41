fn main() { println!("before"); let v: Vec<i32> = vec![]; println!("{}", v[std::env::args().count()]); }
