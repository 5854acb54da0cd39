package qc.model

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.io.Closeable
import java.io.File

/** A text in a graph that takes any length, token by token or many at once. */
internal class Steps(directory: File, private val environment: OrtEnvironment, options: OrtSession.SessionOptions) : Closeable {
    private val session = environment.createSession(File(directory, "model.ort").path, options)
    private var held: OrtSession.Result? = null

    /** The number of tokens that the cache holds. */
    var past = 0
        private set

    companion object {
        val FILES = listOf("model.ort")

        /** One thread for each large core of most phones. */
        fun defaults() = OrtSession.SessionOptions().apply {
            setIntraOpNumThreads(Runtime.getRuntime().availableProcessors().coerceAtMost(4))
        }
    }

    /** Runs once; close the result. */
    fun run(inputs: Map<String, OnnxTensor>): OrtSession.Result = session.run(inputs)

    /** Forgets the text. */
    fun reset() {
        held?.close()
        held = null
        past = 0
    }

    /** What the output of that name is for [tokens], behind those of before. */
    fun feed(tokens: LongArray, output: String): FloatArray {
        val made = textInputs(environment, tokens, past) + emptyCaches()
        try {
            val caches = Interface.CACHES.mapNotNull { (before, after) -> held?.tensor(after)?.let { before to it } }
            val outputs = session.run(made + caches)
            val found = outputs.tensor(output).floatBuffer.toArray()
            held?.close()
            held = outputs
            if (Interface.CACHES.isNotEmpty()) past += tokens.size
            return found
        } finally {
            made.values.forEach { it.close() }
        }
    }

    override fun close() {
        held?.close()
        session.close()
    }

    private fun emptyCaches(): Map<String, OnnxTensor> {
        if (past > 0) return emptyMap()
        return Interface.INPUTS.filter { it.role.startsWith("past_") }.associate { port ->
            // Of the axes of any length the first is the batch, the others time.
            val shape = port.shape.mapIndexed { axis, size -> (size ?: if (axis == 0) 1 else 0).toLong() }
            val kind = if (port.type == "float16") ai.onnxruntime.OnnxJavaType.FLOAT16 else ai.onnxruntime.OnnxJavaType.FLOAT
            val nothing = java.nio.ByteBuffer.allocateDirect(0)
            port.name to OnnxTensor.createTensor(environment, nothing, shape.toLongArray(), kind)
        }
    }
}
