struct A;
impl Drop for A { fn drop(&mut self) { println!("dropped"); } }
fn main() { let _a = A; eprintln!("err"); print!("no newline"); std::process::exit(300) }
