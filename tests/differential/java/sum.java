// differential: {"stdin": "3 4\n"}
import java.util.*;
public class Main { public static void main(String[] a) { Scanner s = new Scanner(System.in); System.out.println(s.nextInt() + s.nextInt()); } }
