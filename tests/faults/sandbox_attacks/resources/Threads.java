// Starts threads that start threads, and catches what the machine throws for want of room.
public class Main {
    static void more() {
        while (true) {
            try {
                new Thread(Main::more).start();
            } catch (Throwable full) {
            }
        }
    }

    public static void main(String[] arguments) {
        more();
    }
}
