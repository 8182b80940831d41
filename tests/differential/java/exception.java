public class Main { static void f(int n) { Object o = new int[2][n]; ((int[][]) o)[2][0] = 1; } public static void main(String[] a) { System.out.println("before"); f(3); } }
