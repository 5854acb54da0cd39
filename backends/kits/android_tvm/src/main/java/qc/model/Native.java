package qc.model;

import java.nio.ByteBuffer;

/** The functions of model.h. A handle is an address; a failure is an IllegalStateException with the library's words. */
public final class Native {
    static {
        System.loadLibrary("qc_model");
    }

    private Native() {}

    public static native long open(String weights);

    public static native void close(long model);

    public static native long create(long model, int threads);

    public static native void destroy(long instance);

    public static native void run(long instance, long[] dims, ByteBuffer[] inputs, ByteBuffer[] outputs);
@@java_generate@@}
