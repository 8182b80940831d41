public class Main { int x = "s"; }
