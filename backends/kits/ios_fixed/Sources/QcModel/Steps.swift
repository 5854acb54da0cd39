import Foundation
import OnnxRuntimeBindings

/// A text in graphs of fixed shapes, and those around them that fit any length to these.
///
/// It is fed in pieces that the largest graph takes, a token alone to the smallest. Before each, `inputs.onnx` makes masks and
/// positions; behind it, `append.onnx` puts new keys and values into the caches.
final class Steps {
    static let files = [@@swift_names@@]

    /// The number of tokens that the cache holds.
    private(set) var past = 0

    private let graphs: [(session: ORTSession, size: Int)]
    private let inputs: ORTSession?
    private let empty: ORTSession?
    private let append: ORTSession?
    private var caches: [String: ORTValue] = [:]

    init(_ directory: URL, _ environment: ORTEnv, threads: Int32) throws {
        let options = try ORTSessionOptions()
        try options.setIntraOpNumThreads(threads)
        try options.appendCoreMLExecutionProvider(withOptionsV2: ["ModelFormat": "MLProgram"])
        func open(_ name: String, _ options: ORTSessionOptions?) throws -> ORTSession {
            let file = directory.appendingPathComponent(name).path
            return try ORTSession(env: environment, modelPath: file, sessionOptions: options)
        }
        func beside(_ name: String) throws -> ORTSession? {
            Self.files.contains(name) ? try open(name, nil) : nil
        }
        graphs = try Interface.graphs.map { (try open($0.file, options), $0.size) }
        inputs = try beside("inputs.onnx")
        empty = try beside("empty.onnx")
        append = try beside("append.onnx")
    }

    /// Runs the largest graph once, on tensors of its fixed shapes.
    func run(_ inputs: [String: ORTValue]) throws -> [String: ORTValue] {
        try graphs.last.map { try run($0.session, inputs) } ?? [:]
    }

    /// Forgets the text.
    func reset() throws {
        past = 0
        caches = try run(empty, [:])
    }

    /// What the output of that name is for `tokens`, behind those of before; of several pieces, for the last.
    func feed(_ tokens: [Int], _ output: String) throws -> [Float] {
        var found: [Float] = []
        var rest = tokens[...]
        while !rest.isEmpty, let largest = graphs.last {
            let graph = graphs.first { $0.size >= rest.count } ?? largest
            found = try piece(graph.session, graph.size, Array(rest.prefix(graph.size)), output)
            rest = rest.dropFirst(graph.size)
        }
        return found
    }

    private func piece(_ session: ORTSession, _ size: Int, _ tokens: [Int], _ output: String) throws -> [Float] {
        var lengths: [String: ORTValue] = [:]
        for (name, length) in [("past_length", past), ("count", tokens.count), ("graph_length", size)] {
            lengths[name] = try tensor([Int64(length)], .int64, [1])
        }
        let made = try run(inputs, textInputs(tokens, past).merging(lengths) { $1 })
        let fed = try padded(tokens, size).merging(made) { $1 }.merging(caches) { $1 }
        let outputs = try run(session, fed)
        guard let found = outputs[output] else { return [] }
        if append != nil {
            let held = try run(append, caches.merging(outputs) { $1 }.merging(lengths) { $1 })
            caches = Dictionary(uniqueKeysWithValues: held.map { (String($0.key.dropLast(".next".count)), $0.value) })
            past += tokens.count
        }
        let all = try floats(found)
        let along = Interface.outputs.first { $0.name == output }?.role != "embedding"
        return along ? Array(all.prefix(all.count / size * tokens.count)) : all
    }

    /// Inputs that belong to tokens, with zeros behind their end; indices have 32 bits.
    private func padded(_ tokens: [Int], _ size: Int) throws -> [String: ORTValue] {
        var made: [String: ORTValue] = [:]
        for port in Interface.inputs where !port.role.hasPrefix("past_") {
            let numbers = (numbers(of: port, tokens, past) + [Int](repeating: 0, count: size)).prefix(size)
            let shape = port.shape.count == 1 ? [size] : [1, size]
            let whole = port.type.hasPrefix("int")
            made[port.name] = try whole
                ? tensor(numbers.map(Int32.init), .int32, shape) : tensor(numbers.map(Float.init), .float, shape)
        }
        return made
    }

    /// Runs once, on those of the tensors that the graph takes; nothing if the model does not have the graph.
    private func run(_ session: ORTSession?, _ inputs: [String: ORTValue]) throws -> [String: ORTValue] {
        guard let session else { return [:] }
        let names = Set(try session.inputNames())
        let taken = inputs.filter { names.contains($0.key) }
        return try session.run(withInputs: taken, outputNames: Set(try session.outputNames()), runOptions: nil)
    }
}
