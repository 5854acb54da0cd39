package qc.model

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.io.Closeable
import java.io.File
import java.nio.FloatBuffer
import java.nio.IntBuffer
import java.nio.LongBuffer

/** The model in ONNX Runtime. For one thread at a time. */
class Model private constructor(private val steps: Steps, private val text: Text?) : Closeable {
    companion object {
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
            Artifact.check(directory, Steps.FILES, environment.version)
            return Model(Steps(directory, environment, options), text)
        }

        /** The options that this model runs well with. */
        fun defaults(): OrtSession.SessionOptions = Steps.defaults()
    }

    /** Runs once; close the result. Names: [Inputs] and [Outputs]. */
    fun run(inputs: Map<String, OnnxTensor>): OrtSession.Result = steps.run(inputs)

    /** The continuation of [tokens], each the most probable one. */
    @JvmOverloads
    fun generateTokens(tokens: LongArray, maxTokens: Int = 64): Sequence<Long> = sequence {
        check(Interface.TASK == "generate") { "this model cannot generate; it can ${Interface.TASK}" }
        require(tokens.size in 1 until Interface.LIMIT) { "expected a prompt of 1 to ${Interface.LIMIT - 1} tokens" }
        val logits = Interface.OUTPUTS.first { it.role == "logits" }
        var fresh = tokens
        steps.reset()
        repeat(minOf(maxTokens, Interface.LIMIT - tokens.size)) {
            val found = steps.feed(fresh, logits.name)
            val token = best(found, logits.shape.last() ?: found.size)
            if (token in Interface.STOP) return@sequence
            yield(token)
            fresh = if (Interface.CACHES.isEmpty()) fresh + token else longArrayOf(token)
        }
    }

    /** The continuation of a text, piece by piece. */
    @JvmOverloads
    fun generate(prompt: String, maxTokens: Int = 64): Sequence<String> {
        val tokenizer = needText()
        return tokenizer.stream(generateTokens(tokenizer.prompt(prompt), maxTokens))
    }

    /** The vector of a sentence; see [similarity]. */
    fun embed(sentence: String): FloatArray {
        check(Interface.TASK == "embed") { "this model cannot embed; it can ${Interface.TASK}" }
        val tokens = needText().sentence(sentence)
        steps.reset()
        val whole = Interface.OUTPUTS.firstOrNull { it.role == "embedding" }
        if (whole != null) return steps.feed(tokens, whole.name)
        return pooled(steps.feed(tokens, Interface.OUTPUTS.first { it.role == "hidden" }.name), tokens.size)
    }

    override fun close() = steps.close()

    private fun needText(): Text = text
        ?: throw ArtifactException("tokenizer.json", "the model was opened without a tokenizer, so it takes token ids")
}

/** The inputs that tell of [tokens] behind [past] others: the ids, masks, positions. */
internal fun textInputs(environment: OrtEnvironment, tokens: LongArray, past: Int): Map<String, OnnxTensor> =
    Interface.INPUTS.filter { !it.role.startsWith("past_") }.associate { port ->
        val numbers = numbersOf(port, tokens, past)
        val shape = shapeOf(port, numbers.size)
        port.name to when (port.type) {
            "int64" -> OnnxTensor.createTensor(environment, LongBuffer.wrap(numbers), shape)
            "int32" -> OnnxTensor.createTensor(environment, IntBuffer.wrap(IntArray(numbers.size) { numbers[it].toInt() }), shape)
            else -> OnnxTensor.createTensor(environment, FloatBuffer.wrap(FloatArray(numbers.size) { numbers[it].toFloat() }), shape)
        }
    }

internal fun numbersOf(port: Interface.Port, tokens: LongArray, past: Int): LongArray = when (port.role) {
    "tokens" -> tokens
    "mask" -> LongArray(past + tokens.size) { 1 }
    "positions" -> LongArray(tokens.size) { (past + it).toLong() }
    else -> LongArray(tokens.size)
}

internal fun shapeOf(port: Interface.Port, count: Int): LongArray =
    if (port.shape.size == 1) longArrayOf(count.toLong()) else longArrayOf(1, count.toLong())

internal fun OrtSession.Result.tensor(name: String): OnnxTensor = get(name).get() as OnnxTensor

internal fun FloatBuffer.toArray(): FloatArray = FloatArray(remaining()).also { get(it) }

/** The most probable token at the last position. */
private fun best(logits: FloatArray, width: Int): Long {
    val start = logits.size - width
    var found = 0
    for (i in 1 until width) if (logits[start + i] > logits[start + found]) found = i
    return found.toLong()
}
