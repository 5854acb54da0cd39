package qc.model

import java.io.Closeable
import java.io.File

/** The model as a library without a runtime. For one thread at a time. */
class Model private constructor(private val weights: Long, private val text: Text?) : Closeable {
    private val instance = Native.create(weights, Runtime.getRuntime().availableProcessors().coerceAtMost(4))

    companion object {
        private val FILES = listOf("model.weights")

        /**
         * Checks every file in [directory] against the manifest, then maps the weights.
         *
         * @param text The tokenizer, for example `HuggingFaceText(directory)`; null for token ids alone.
         */
        @JvmStatic
        @JvmOverloads
        @Throws(ArtifactException::class)
        fun open(directory: File, text: Text? = null): Model {
            Artifact.check(directory, FILES, null)
            return Model(Native.open(File(directory, "model.weights").path), text)
        }
    }
@@kotlin_generate@@
    /** Runs once: the sizes of the dimensions, and one direct buffer per port, in the order of model.h. */
    fun run(dims: LongArray, inputs: Array<java.nio.ByteBuffer?>, outputs: Array<java.nio.ByteBuffer?>) =
        Native.run(instance, dims, inputs, outputs)

    override fun close() {
        Native.destroy(instance)
        Native.close(weights)
    }
}
