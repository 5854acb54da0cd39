package qc.model

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.io.Closeable
import java.io.File
import java.nio.FloatBuffer
import java.nio.IntBuffer
import java.nio.LongBuffer

/** The model in ONNX Runtime. For one thread at a time. */
class Model private constructor(private val session: OrtSession, private val text: Text?) : Closeable {
    private val environment = OrtEnvironment.getEnvironment()

    companion object {
        private val FILES = listOf("model.ort")

        /**
         * Checks the runtime's version and every file in [directory] against the manifest, then loads the model.
         *
         * @param text The tokenizer, for example `HuggingFaceText(directory)`; null for token ids alone.
         */
        @JvmStatic
        @JvmOverloads
        @Throws(ArtifactException::class)
        fun open(directory: File, text: Text? = null, options: OrtSession.SessionOptions = defaults()): Model {
            val environment = OrtEnvironment.getEnvironment()
            Artifact.check(directory, FILES, environment.version)
            return Model(environment.createSession(File(directory, "model.ort").path, options), text)
        }

        /** One thread for each large core of most phones. */
        fun defaults() = OrtSession.SessionOptions().apply {
            setIntraOpNumThreads(Runtime.getRuntime().availableProcessors().coerceAtMost(4))
        }
    }

    /** Runs once; close the result. Names: [Inputs] and [Outputs]. */
    fun run(inputs: Map<String, OnnxTensor>): OrtSession.Result = session.run(inputs)

    /** The continuation of [tokens], each the most probable one. */
    fun generateTokens(tokens: LongArray, maxTokens: Int = 64): Sequence<Long> = sequence {
        check(Interface.TASK == "generate") { "this model cannot generate; it can ${Interface.TASK}" }
        require(tokens.size in 1 until Interface.LIMIT) { "expected a prompt of 1 to ${Interface.LIMIT - 1} tokens" }
        val logits = Interface.OUTPUTS.first { it.role == "logits" }.name
        var fresh = tokens
        var past = 0
        var held: OrtSession.Result? = null
        try {
            repeat(minOf(maxTokens, Interface.LIMIT - tokens.size)) {
                val made = textInputs(fresh, past)
                val caches = Interface.CACHES.mapNotNull { (before, after) -> held?.tensor(after)?.let { before to it } }
                val outputs = session.run(made + caches)
                held?.close()
                held = outputs
                made.values.forEach { it.close() }
                val token = best(outputs.tensor(logits).floatBuffer)
                if (token in Interface.STOP) return@sequence
                yield(token)
                past = if (Interface.CACHES.isEmpty()) 0 else past + fresh.size
                fresh = if (Interface.CACHES.isEmpty()) fresh + token else longArrayOf(token)
            }
        } finally {
            held?.close()
        }
    }

    /** The continuation of a text, piece by piece. */
    fun generate(prompt: String, maxTokens: Int = 64): Sequence<String> {
        val tokenizer = needText()
        return tokenizer.stream(generateTokens(tokenizer.prompt(prompt), maxTokens))
    }

    /** The vector of a sentence; see [similarity]. */
    fun embed(sentence: String): FloatArray {
        check(Interface.TASK == "embed") { "this model cannot embed; it can ${Interface.TASK}" }
        val tokens = needText().sentence(sentence)
        val made = textInputs(tokens, 0)
        try {
            session.run(made).use { outputs ->
                val whole = Interface.OUTPUTS.firstOrNull { it.role == "embedding" }
                if (whole != null) return outputs.tensor(whole.name).floatBuffer.toArray()
                val hidden = Interface.OUTPUTS.first { it.role == "hidden" }
                return pooled(outputs.tensor(hidden.name).floatBuffer.toArray(), tokens.size)
            }
        } finally {
            made.values.forEach { it.close() }
        }
    }

    override fun close() = session.close()

    private fun needText(): Text = text
        ?: throw ArtifactException("tokenizer.json", "the model was opened without a tokenizer, so it takes token ids")

    private fun textInputs(tokens: LongArray, past: Int): Map<String, OnnxTensor> {
        val made = HashMap<String, OnnxTensor>()
        for (port in Interface.INPUTS) {
            if (port.role.startsWith("past_")) {
                // Of the axes of any length the first is the batch, the others time.
                val shape = port.shape.mapIndexed { axis, size -> (size ?: if (axis == 0) 1 else 0).toLong() }
                if (past == 0) made[port.name] = emptyCache(port.type, shape.toLongArray())
                continue
            }
            val numbers = when (port.role) {
                "tokens" -> tokens
                "mask" -> LongArray(past + tokens.size) { 1 }
                "positions" -> LongArray(tokens.size) { (past + it).toLong() }
                else -> LongArray(tokens.size)
            }
            val shape = if (port.shape.size == 1) longArrayOf(numbers.size.toLong()) else longArrayOf(1, numbers.size.toLong())
            made[port.name] = when (port.type) {
                "int64" -> OnnxTensor.createTensor(environment, LongBuffer.wrap(numbers), shape)
                "int32" -> OnnxTensor.createTensor(environment, IntBuffer.wrap(IntArray(numbers.size) { numbers[it].toInt() }), shape)
                else -> OnnxTensor.createTensor(environment, FloatBuffer.wrap(FloatArray(numbers.size) { numbers[it].toFloat() }), shape)
            }
        }
        return made
    }

    private fun emptyCache(type: String, shape: LongArray): OnnxTensor {
        val kind = if (type == "float16") OnnxJavaType.FLOAT16 else OnnxJavaType.FLOAT
        return OnnxTensor.createTensor(environment, java.nio.ByteBuffer.allocateDirect(0), shape, kind)
    }
}

private fun OrtSession.Result.tensor(name: String): OnnxTensor = get(name).get() as OnnxTensor

private fun FloatBuffer.toArray(): FloatArray = FloatArray(remaining()).also { get(it) }

/** The most probable token at the last position. */
private fun best(logits: FloatBuffer): Long {
    val width = Interface.OUTPUTS.first { it.role == "logits" }.shape.last() ?: logits.remaining()
    val start = logits.limit() - width
    var found = 0
    for (i in 1 until width) if (logits.get(start + i) > logits.get(start + found)) found = i
    return found.toLong()
}
