package ai.onnxruntime;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.IntBuffer;
import java.nio.LongBuffer;

/** As in the binding, of the types that a buffer can have there: no codes of 16 bits. */
public final class OnnxTensor implements OnnxValue {
    private final OrtEnvironment environment;
    final int handle;
    private boolean closed;

    OnnxTensor(OrtEnvironment environment, int handle) {
        this.environment = environment;
        this.handle = handle;
    }

    public static OnnxTensor createTensor(OrtEnvironment env, LongBuffer data, long[] shape) throws OrtException {
        ByteBuffer bytes = bytes(data.remaining() * 8);
        bytes.asLongBuffer().put(data);
        return new OnnxTensor(env, made(env, "int64", bytes, shape));
    }

    public static OnnxTensor createTensor(OrtEnvironment env, IntBuffer data, long[] shape) throws OrtException {
        ByteBuffer bytes = bytes(data.remaining() * 4);
        bytes.asIntBuffer().put(data);
        return new OnnxTensor(env, made(env, "int32", bytes, shape));
    }

    public static OnnxTensor createTensor(OrtEnvironment env, FloatBuffer data, long[] shape) throws OrtException {
        ByteBuffer bytes = bytes(data.remaining() * 4);
        bytes.asFloatBuffer().put(data);
        return new OnnxTensor(env, made(env, "float32", bytes, shape));
    }

    public static OnnxTensor createTensor(OrtEnvironment env, ByteBuffer data, long[] shape, OnnxJavaType type)
            throws OrtException {
        return new OnnxTensor(env, made(env, type == OnnxJavaType.FLOAT ? "float32" : type.name().toLowerCase(), data, shape));
    }

    public FloatBuffer getFloatBuffer() {
        require();
        try {
            environment.to.writeUTF("read");
            environment.to.writeInt(handle);
            environment.to.flush();
            byte[] bytes = new byte[environment.from.readInt()];
            environment.from.readFully(bytes);
            return ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer();
        } catch (IOException error) {
            throw new IllegalStateException(error);
        }
    }

    public void close() {
        require();
        closed = true;
    }

    void require() {
        if (closed) throw new IllegalStateException("a closed tensor is used");
    }

    private static ByteBuffer bytes(int size) {
        return ByteBuffer.allocate(size).order(ByteOrder.LITTLE_ENDIAN);
    }

    private static int made(OrtEnvironment env, String type, ByteBuffer bytes, long[] shape) throws OrtException {
        try {
            env.to.writeUTF("tensor");
            env.to.writeUTF(type);
            env.to.writeInt(shape.length);
            for (long size : shape) env.to.writeInt((int) size);
            env.to.writeInt(bytes.capacity());
            for (int i = 0; i < bytes.capacity(); i++) env.to.writeByte(bytes.get(i));
            env.to.flush();
            return env.from.readInt();
        } catch (IOException error) {
            throw new OrtException(error);
        }
    }
}
