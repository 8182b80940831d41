// Takes memory outside the heap, which has a limit of its own, and catches what is thrown.
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.List;

public class Main {
    public static void main(String[] arguments) {
        List<ByteBuffer> held = new ArrayList<>();
        while (true) {
            try {
                ByteBuffer piece = ByteBuffer.allocateDirect(1 << 20);
                for (int offset = 0; offset < piece.capacity(); offset += 4096) piece.put(offset, (byte) 1);
                held.add(piece);
            } catch (OutOfMemoryError full) {
            }
        }
    }
}
