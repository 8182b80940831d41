// An expression that is deeper than the compiler's own stack.
public class Main {
    public static void main(String[] arguments) {
        System.out.println(@DEEP@);
    }
}
