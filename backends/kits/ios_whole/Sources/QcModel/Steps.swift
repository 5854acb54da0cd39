import Foundation
import OnnxRuntimeBindings

/// A text in a graph that takes any length, token by token or many at once.
final class Steps {
    static let files = ["model.ort"]

    /// The number of tokens that the cache holds.
    private(set) var past = 0

    private let session: ORTSession
    private var caches: [String: ORTValue] = [:]

    init(_ directory: URL, _ environment: ORTEnv, threads: Int32) throws {
        let options = try ORTSessionOptions()
        try options.setIntraOpNumThreads(threads)
        let file = directory.appendingPathComponent("model.ort").path
        session = try ORTSession(env: environment, modelPath: file, sessionOptions: options)
    }

    /// Runs once.
    func run(_ inputs: [String: ORTValue]) throws -> [String: ORTValue] {
        try session.run(withInputs: inputs, outputNames: Set(Interface.outputs.map(\.name)), runOptions: nil)
    }

    /// Forgets the text.
    func reset() throws {
        past = 0
        caches = [:]
        for port in Interface.inputs where port.role.hasPrefix("past_") {
            // Of the axes of any length the first is the batch, the others time.
            let shape = port.shape.enumerated().map { axis, size in size ?? (axis == 0 ? 1 : 0) }
            caches[port.name] = try tensor([Float](), .float, shape)
        }
    }

    /// What the output of that name is for `tokens`, behind those of before.
    func feed(_ tokens: [Int], _ output: String) throws -> [Float] {
        let outputs = try run(textInputs(tokens, past).merging(caches) { $1 })
        for (before, after) in Interface.caches { caches[before] = outputs[after] }
        past += Interface.caches.isEmpty ? 0 : tokens.count
        return try outputs[output].map(floats) ?? []
    }
}
