import java.io.*;
import java.util.*;
import java.util.stream.*;
public class Main { public static void main(String[] a) throws IOException { BufferedReader r = new BufferedReader(new InputStreamReader(System.in)); System.out.println(r.lines().collect(Collectors.toList()) + "é✓" + Locale.getDefault() + String.format("%.2f", 1.5)); System.err.println("err"); } }
