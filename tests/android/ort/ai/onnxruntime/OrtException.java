package ai.onnxruntime;

public final class OrtException extends Exception {
    OrtException(Object message) {
        super(String.valueOf(message));
    }
}
