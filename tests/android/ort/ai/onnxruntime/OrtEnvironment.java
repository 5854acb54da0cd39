package ai.onnxruntime;

import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.File;
import java.io.IOException;

/** Stands for ONNX Runtime's binding for Java, which needs Android: asks bridge.py, which runs the one for Python. */
public final class OrtEnvironment {
    private static OrtEnvironment one;
    final DataOutputStream to;
    final DataInputStream from;

    private OrtEnvironment() throws IOException {
        ProcessBuilder builder = new ProcessBuilder(System.getProperty("bridge").split(File.pathSeparator));
        Process process = builder.redirectError(ProcessBuilder.Redirect.INHERIT).start();
        to = new DataOutputStream(process.getOutputStream());
        from = new DataInputStream(process.getInputStream());
    }

    public static synchronized OrtEnvironment getEnvironment() {
        try {
            if (one == null) one = new OrtEnvironment();
            return one;
        } catch (IOException error) {
            throw new IllegalStateException(error);
        }
    }

    public String getVersion() {
        return System.getProperty("version");
    }

    public OrtSession createSession(String path, OrtSession.SessionOptions options) throws OrtException {
        return new OrtSession(this, path);
    }
}
