package qc.model

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.io.Closeable
import java.io.File
import java.nio.FloatBuffer
import java.nio.IntBuffer
import java.nio.LongBuffer

/**
 * A text in graphs of fixed shapes, and those around them that fit any length to these.
 *
 * It is fed in pieces that the largest graph takes, a token alone to the smallest. Before each, `inputs.onnx` makes masks
 * and positions; behind it, `append.onnx` puts new keys and values into the caches.
 */
internal class Steps(directory: File, private val environment: OrtEnvironment, options: OrtSession.SessionOptions) : Closeable {
    private class Graph(val session: OrtSession, val size: Int)

    private val graphs = Interface.GRAPHS.map { (name, size) ->
        Graph(environment.createSession(File(directory, name).path, options), size)
    }
    private val inputs = beside(directory, "inputs.onnx")
    private val empty = beside(directory, "empty.onnx")
    private val append = beside(directory, "append.onnx")
    private var held: OrtSession.Result? = empty?.run(emptyMap())
    private var behind = ""

    /** The number of tokens that the cache holds. */
    var past = 0
        private set

    companion object {
        val FILES = listOf(@@kotlin_files@@)

        /** The accelerator that the graphs are written for. */
        fun defaults() = OrtSession.SessionOptions().apply {
@@kotlin_provider@@
        }
    }

    /** Runs the largest graph once, on tensors of its fixed shapes; close the result. */
    fun run(inputs: Map<String, OnnxTensor>): OrtSession.Result = graphs.last().session.run(inputs)

    /** Forgets the text. */
    fun reset() {
        held?.close()
        held = empty?.run(emptyMap())
        behind = ""
        past = 0
    }

    /** What the output of that name is for [tokens], behind those of before; of several pieces, for the last. */
    fun feed(tokens: LongArray, output: String): FloatArray {
        var found = FloatArray(0)
        var done = 0
        while (done < tokens.size) {
            val graph = graphs.firstOrNull { it.size >= tokens.size - done } ?: graphs.last()
            val count = minOf(graph.size, tokens.size - done)
            found = piece(graph, tokens.copyOfRange(done, done + count), output)
            done += count
        }
        return found
    }

    override fun close() {
        held?.close()
        listOfNotNull(inputs, empty, append).forEach { it.close() }
        graphs.forEach { it.session.close() }
    }

    private fun piece(graph: Graph, tokens: LongArray, output: String): FloatArray {
        val made = textInputs(environment, tokens, past)
        val lengths = listOf("past_length" to past, "count" to tokens.size, "graph_length" to graph.size)
            .associate { (name, size) -> name to number(size) }
        val padded = padded(graph, tokens)
        var around: OrtSession.Result? = null
        var outputs: OrtSession.Result? = null
        try {
            around = inputs?.run((made + lengths).filterKeys { it in inputs.inputNames })
            val names = graph.session.inputNames
            val fed = padded + caches() + (around?.associate { it.key to it.value as OnnxTensor } ?: emptyMap())
            outputs = graph.session.run(fed.filterKeys { it in names })
            val all = outputs.tensor(output).floatBuffer.toArray()
            keep(outputs, lengths, tokens.size)
            val along = Interface.OUTPUTS.first { it.name == output }.role != "embedding"
            return if (along) all.copyOf(all.size / graph.size * tokens.size) else all
        } finally {
            around?.close()
            outputs?.close()
            (made + lengths + padded).values.forEach { it.close() }
        }
    }

    private fun caches(): Map<String, OnnxTensor> =
        Interface.CACHES.mapNotNull { (before, _) -> held?.let { before to it.tensor(before + behind) } }.toMap()

    private fun keep(outputs: OrtSession.Result, lengths: Map<String, OnnxTensor>, count: Int) {
        if (append == null) return
        val presents = Interface.CACHES.associate { (_, after) -> after to outputs.tensor(after) }
        val next = append.run((caches() + presents + lengths).filterKeys { it in append.inputNames })
        held?.close()
        held = next
        behind = ".next"
        past += count
    }

    /** Inputs of the graph that belong to tokens, with zeros behind their end; indices have 32 bits. */
    private fun padded(graph: Graph, tokens: LongArray): Map<String, OnnxTensor> =
        Interface.INPUTS.filter { it.name in graph.session.inputNames && !it.role.startsWith("past_") }.associate { port ->
            val numbers = numbersOf(port, tokens, past).copyOf(graph.size)
            val shape = shapeOf(port, graph.size)
            port.name to when (port.type) {
                "int64", "int32" -> OnnxTensor.createTensor(environment, IntBuffer.wrap(IntArray(graph.size) { numbers[it].toInt() }), shape)
                else -> OnnxTensor.createTensor(environment, FloatBuffer.wrap(FloatArray(graph.size) { numbers[it].toFloat() }), shape)
            }
        }

    private fun number(size: Int) = OnnxTensor.createTensor(environment, LongBuffer.wrap(longArrayOf(size.toLong())), longArrayOf(1))

    /** A small graph for the processor, if the model has it. */
    private fun beside(directory: File, name: String): OrtSession? =
        File(directory, name).takeIf { it.isFile }?.let { environment.createSession(it.path, OrtSession.SessionOptions()) }
}
